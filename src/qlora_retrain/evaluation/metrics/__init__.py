"""Numbers of a contestant: of what it wrote (`texts`), and of all its rows together (`measures`)."""
