"""A trained run in the forms of other libraries: `supclap export`."""
