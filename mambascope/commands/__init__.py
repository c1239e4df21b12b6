"""The commands behind ``tools/``: one file each, imported by nothing in the package."""
