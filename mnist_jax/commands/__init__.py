"""Commands that have not moved to the file that does their work yet."""
