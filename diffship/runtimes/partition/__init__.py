"""One denoiser on several devices at once: placement, timetable, and the executors that run it."""
