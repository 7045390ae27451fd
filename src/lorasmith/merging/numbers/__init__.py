"""The arithmetic of the merge: correctly rounded values of W + s·B·A."""
