"""Every hook on the user's model while it is scored."""
