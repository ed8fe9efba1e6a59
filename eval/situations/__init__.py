"""Generated situations: a patched model does what its report says, however it is called and whatever is around it."""
