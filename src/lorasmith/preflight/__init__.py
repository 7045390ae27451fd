"""Before a run: is everything there, will it fit, how long will it take, what will it cost."""
