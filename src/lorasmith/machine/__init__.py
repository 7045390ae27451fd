"""What this machine has and takes: memory, disk, processors, devices, energy."""
