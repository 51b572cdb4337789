"""The commands of the application, each with its options and what it prints."""
