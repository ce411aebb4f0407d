"""One file, one method, one paper. Needs torch alone."""
