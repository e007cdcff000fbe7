"""Other people's training code: a file for each package, which imports it; nothing else here does."""
