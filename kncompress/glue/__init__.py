"""All of GLUE: tasks, readers, scores, the fine-tuning module, the cells of a suite."""
