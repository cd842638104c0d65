"""Reading streams: invalidations, pipelines, examinations, pages, history."""
