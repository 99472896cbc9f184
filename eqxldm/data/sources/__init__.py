"""Where images can be: folders, tars, parquet and ArrayRecord files, arrays in memory."""
