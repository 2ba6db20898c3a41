"""The published algorithms, each in the file named for its paper. They know no model."""
