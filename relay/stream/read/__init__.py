"""Reading streams: wake-ups, pipelines, examination, pages, history."""
