"""A relay process: composition, HTTP server, several workers, periodic jobs, drain, logging."""
