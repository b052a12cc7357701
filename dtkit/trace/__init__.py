"""What ranks recorded of their time, as values: read, merged into one trace, analysed.

Standard library and numpy: the engines write these rows, the driver reads them.
"""
