"""Search spaces that ship with autorank, one YAML file per kind of search."""
