"""What everything else rests on: the graph, errors, hashes, URIs, signals. Standard library only."""
