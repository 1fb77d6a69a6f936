"""How reconstructions are judged: data, subjects, workers, reports."""
