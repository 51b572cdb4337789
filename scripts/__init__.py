"""Tools around the package, a room for each purpose; none of them is installed."""
