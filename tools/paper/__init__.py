"""The paper's experiments in miniature. One file each, on what lab.py trains and draws, for the page of page.py."""

# In the page's order: each is the name of a module here, and of its file of numbers.
NAMES = (
    "convergence",
    "architectures",
    "copies",
    "data_size",
    "guidance",
    "composition",
    "cost",
    "transfer",
    "segmentation",
)
