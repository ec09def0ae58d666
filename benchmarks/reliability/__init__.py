"""What happens to runs that are killed, disks that are full, files that are damaged, and memory that is not enough."""
