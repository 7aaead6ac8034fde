"""Methods with a command of their own: `command` in the file named after the method is ``tokenmill run SLUG``."""
