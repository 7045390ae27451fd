"""Work on another machine: by ssh on any, on a rented one for as long as it is needed; and what it costs."""
