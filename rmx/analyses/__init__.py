"""The paper's analyses of a run (arXiv 2605.06241, sections 2 and 3); each writes JSON, a table and a PNG."""
