"""The tasks of the bench. The folder is the registry: a module without a leading underscore is a task."""
