#!/usr/bin/env node
import { runCommandLine } from './program.ts';

// `sageattention doctor | head`: who reads no further is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0);
  throw error;
});
process.exitCode = await runCommandLine(process.argv.slice(2));
