"""The package: archives, manifest, checksums."""
