"""Where generated code runs: without files, network or other processes, under limits."""
