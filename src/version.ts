/** The package's version, where no file can be read. A test compares it with `package.json`. */
export const VERSION = '0.1.0';
