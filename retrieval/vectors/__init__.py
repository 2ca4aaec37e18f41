"""What holds the vectors of an index: one kind of structure a file, their choice, and the file."""
