"""Published schedules that are no placements, studied on the cost functions of the library."""
