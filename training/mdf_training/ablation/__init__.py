"""The paper's studies: variants trained over seeds, compared case by case."""
