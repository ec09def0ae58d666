"""What `make docs` does beside mkdocs: outputs of the pages' own code, reference, links, formulas."""
