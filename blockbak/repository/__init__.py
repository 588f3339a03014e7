"""Where images live: directories, manifests, locks."""
