"""Optional quality filters: what is repaired in a row, and why a row is dropped.

`quality.apply_filters` runs those that `data.filters` switches on and returns the `Filtered` row;
`languages.refuse_unknown_languages` checks the configuration. Nothing else is called from outside.
To add a filter: a function, its setting in `config.FiltersConfig`, and its line in `quality`.
"""
