"""Commands of single methods: ``tokenmill run <slug>``, one module each."""
