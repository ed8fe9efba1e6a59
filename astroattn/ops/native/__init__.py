"""The operations in C++ for the CPU: called with ctypes, built when the package is installed (see `build`)."""
