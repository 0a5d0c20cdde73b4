"""ReasonMaxxer (arXiv 2605.06241): rollouts, verify, score, select, train, evaluate, in that order.

Each stage is a module of its own name with one function over the typed records of :mod:`rmx.records`.
"""
