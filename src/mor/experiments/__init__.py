"""Experiments: many training runs that answer one question. In reading order:

experiment   a YAML spec of variants, sizes, budgets and seeds, and the runs planned from it
results      what the finished runs say: a table, a JSON file, a plot
"""
