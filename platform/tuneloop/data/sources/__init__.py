"""Reading rows: from `data.sources` to conversations or documents, or the reason why not.

`files.find_files` finds the files behind the sources, and `read.read_sources` reads them all over
Ray (`SourceRows`); without Ray `readers.read_source` yields the rows of one file. Below them:
`bad_rows` (all that is wrong with the rows in one message), `formats` (layouts of a row), `splits`
and `hub` (data sets in the Hub's layout), `docstrings` (a built-in source).
"""
