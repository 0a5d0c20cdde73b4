"""The element-wise work of a decoder layer in one kernel each."""
