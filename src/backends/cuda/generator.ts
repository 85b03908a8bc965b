/**
 * SHA-256 of the code that makes kernels, which the build of the package writes here: with it a kernel that lies compiled on disk is found
 * by its configuration, without being generated. Undefined where the sources run as they are: there a kernel's PTX names it.
 */
export const GENERATOR_DIGEST: string | undefined = undefined;
