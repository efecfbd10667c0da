"""The command lines of the converters: what a user gives them, what they say, and the order of their work."""
