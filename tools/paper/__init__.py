"""The paper's experiments in miniature. One file each, on what lab.py trains and draws, for the page of page.py."""
