"""The published tables: rows assembled in order, documents packed, Parquet written."""
