"""Private parts of other libraries that have no public door, one module for each library."""
