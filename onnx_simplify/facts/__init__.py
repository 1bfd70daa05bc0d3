"""What is known of a graph: which channels are constant, and which are needed."""
