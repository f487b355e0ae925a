"""Model to operator graph: trace, simplify, fold into block kinds, read what is saved for backward."""
