"""Reading rows: from `data.sources` to conversations or documents, or the reason why not.

`files.find_files` finds the files behind the sources, `readers.read_source` reads one of them row
by row, and `bad_rows` says all that is wrong with the rows at once. Below them: `hub` and `splits`
(data sets in the Hub's layout), `formats` (layouts of a row), `docstrings` (a built-in source).
"""
