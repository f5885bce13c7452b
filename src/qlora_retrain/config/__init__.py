"""The YAML of a line: models of every section (`sections`), and reading one with all its errors at once (`load`)."""
