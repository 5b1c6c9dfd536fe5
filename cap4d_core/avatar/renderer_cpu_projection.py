"""Compiled kernels that project Gaussian splats and shade them, with their gradients.

Conventions: world and camera axes are OpenCV's (+x right, +y down, +z forward), metres; pixel
(column u, row v) has its centre at (u + 0.5, v + 0.5); quaternions are wxyz and need not be
normalised. The projection is the EWA splat of Zwicker et al. 2001 with the constants of gsplat
1.5.3 (`ProjectionEWA3DGSFused.cu`), the colour real spherical harmonics up to degree 3
(Sloan, JCGT 2013).

Arithmetic is done in float64 registers whatever the array type: these loops are scalar, so it
costs little, and float32 and float64 arrays share one source. A call handles a range of splats;
ranges share no output element, so they can run in parallel and results do not depend on how many.
"""

# mypy: disallow-untyped-defs=False
# (compiled functions: numba infers the argument types, annotations would be ignored)

import math
from typing import Any

import numpy as np
from numba import njit

EPS2D = 0.3
"""Low-pass filter: added to both diagonal entries of the projected covariance, px^2."""

ALPHA_MIN = 1.0 / 255.0
"""Contributions below this opacity are skipped."""

EXTENT_MAX = 3.33
"""Upper bound of the splat radius in standard deviations."""

FRUSTUM_MARGIN = 0.3
"""The projection's Jacobian is evaluated at most this fraction of tan(fov/2) outside the image."""

_KERNEL: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "nsz", "arcp", "reassoc"},  # not nnan: NaN must cull a splat
}


@njit(**_KERNEL)
def _sh_basis(degree, x, y, z, out):
    """Write the (degree + 1)^2 basis values of unit direction (x, y, z)."""
    out[0] = 0.2820947917738781
    if degree < 1:
        return
    out[1] = -0.48860251190292 * y
    out[2] = 0.48860251190292 * z
    out[3] = -0.48860251190292 * x
    if degree < 2:
        return
    z2 = z * z
    c1 = x * x - y * y
    s1 = 2.0 * x * y
    out[4] = 0.5462742152960395 * s1
    out[5] = -1.092548430592079 * z * y
    out[6] = 0.9461746957575601 * z2 - 0.3153915652525201
    out[7] = -1.092548430592079 * z * x
    out[8] = 0.5462742152960395 * c1
    if degree < 3:
        return
    middle = -2.285228997322329 * z2 + 0.4570457994644658
    out[9] = -0.5900435899266435 * (x * s1 + y * c1)
    out[10] = 1.445305721320277 * z * s1
    out[11] = middle * y
    out[12] = z * (1.865881662950577 * z2 - 1.119528997770346)
    out[13] = middle * x
    out[14] = 1.445305721320277 * z * c1
    out[15] = -0.5900435899266435 * (x * c1 - y * s1)


@njit(**_KERNEL)
def _sh_direction_gradient(degree, x, y, z, v):
    """Gradient to the unit direction; v[k] is the gradient to basis value k."""
    if degree < 1:
        return 0.0, 0.0, 0.0
    gx = -0.48860251190292 * v[3]
    gy = -0.48860251190292 * v[1]
    gz = 0.48860251190292 * v[2]
    if degree < 2:
        return gx, gy, gz
    c1 = x * x - y * y
    s1 = 2.0 * x * y
    k, m = 0.5462742152960395, -1.092548430592079
    gx += k * 2.0 * (y * v[4] + x * v[8]) + m * z * v[7]
    gy += k * 2.0 * (x * v[4] - y * v[8]) + m * z * v[5]
    gz += m * (y * v[5] + x * v[7]) + 2.0 * 0.9461746957575601 * z * v[6]
    if degree < 3:
        return gx, gy, gz
    z2 = z * z
    k, m = -0.5900435899266435, 1.445305721320277
    middle = -2.285228997322329 * z2 + 0.4570457994644658
    middle_z = -2.0 * 2.285228997322329 * z
    gx += (
        3.0 * k * (s1 * v[9] + c1 * v[15]) + 2.0 * m * z * (y * v[10] + x * v[14]) + middle * v[13]
    )
    gy += (
        3.0 * k * (c1 * v[9] - s1 * v[15]) + 2.0 * m * z * (x * v[10] - y * v[14]) + middle * v[11]
    )
    gz += m * (s1 * v[10] + c1 * v[14]) + middle_z * (y * v[11] + x * v[13])
    gz += (3.0 * 1.865881662950577 * z2 - 1.119528997770346) * v[12]
    return gx, gy, gz


@njit(**_KERNEL)
def _camera_position(camera, px, py, pz):
    """World point to camera axes."""
    return (
        camera[0, 0] * px + camera[0, 1] * py + camera[0, 2] * pz + camera[0, 3],
        camera[1, 0] * px + camera[1, 1] * py + camera[1, 2] * pz + camera[1, 3],
        camera[2, 0] * px + camera[2, 1] * py + camera[2, 2] * pz + camera[2, 3],
    )


@njit(**_KERNEL)
def _unit_quaternion(quat):
    """Normalised w, x, y, z and the inverse norm."""
    w, x, y, z = float(quat[0]), float(quat[1]), float(quat[2]), float(quat[3])
    inverse = 1.0 / max(math.sqrt(w * w + x * x + y * y + z * z), 1e-12)
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@njit(**_KERNEL)
def _camera_rotation(camera, w, x, y, z, out):
    """Write camera rotation times rotation of the unit quaternion into out (3, 3)."""
    for i in range(3):
        c0, c1, c2 = camera[i, 0], camera[i, 1], camera[i, 2]
        out[i, 0] = (
            c0 * (1 - 2 * (y * y + z * z)) + c1 * 2 * (x * y + w * z) + c2 * 2 * (x * z - w * y)
        )
        out[i, 1] = (
            c0 * 2 * (x * y - w * z) + c1 * (1 - 2 * (x * x + z * z)) + c2 * 2 * (y * z + w * x)
        )
        out[i, 2] = (
            c0 * 2 * (x * z + w * y) + c1 * 2 * (y * z - w * x) + c2 * (1 - 2 * (x * x + y * y))
        )


@njit(**_KERNEL)
def _frustum_clamp(slope, focal, centre, size):
    """Slope (x/z or y/z) clamped to the image plus margin, and whether it was inside."""
    margin = FRUSTUM_MARGIN * 0.5 * size / focal
    low = -(centre / focal + margin)
    high = (size - centre) / focal + margin
    return min(high, max(low, slope)), low <= slope and slope <= high


@njit(**_KERNEL)
def project(
    start, stop, means, quats, scales, opacities, sh, degree, cameras, intrinsics, centres,
    width, height, near, far, means2d, conics, colors, depths, radii,
):  # fmt: skip
    """Fill means2d, conics, colors, depths and radii of the visible splats among start..stop.

    Shapes: means (B, N, 3), quats (B, N, 4), scales (B, N, 3), opacities (B, N), sh (1 or B, N, K,
    3), cameras (B, 4, 4) world to camera, intrinsics (B, 3, 3), centres (B, 3) camera centres in
    the world; outputs (B, N, 2), (B, N, 3), (B, N, 3), (B, N), (B, N, 2) int32, zero on entry.
    """
    basis = np.empty(16)
    rotation = np.empty((3, 3))
    num_bases = (degree + 1) * (degree + 1)
    for b in range(means.shape[0]):
        fx, fy = float(intrinsics[b, 0, 0]), float(intrinsics[b, 1, 1])
        cx, cy = float(intrinsics[b, 0, 2]), float(intrinsics[b, 1, 2])
        camera = cameras[b]
        sh_row = min(b, sh.shape[0] - 1)
        for n in range(start, stop):
            px, py, pz = float(means[b, n, 0]), float(means[b, n, 1]), float(means[b, n, 2])
            x, y, z = _camera_position(camera, px, py, pz)
            opacity = float(opacities[b, n])
            if not (z >= near and z <= far and opacity >= ALPHA_MIN):
                continue
            w, i, j, k, _ = _unit_quaternion(quats[b, n])
            _camera_rotation(camera, w, i, j, k, rotation)
            rz = 1.0 / z
            slope_x, _ = _frustum_clamp(x * rz, fx, cx, width)
            slope_y, _ = _frustum_clamp(y * rz, fy, cy, height)
            j00, j11 = fx * rz, fy * rz
            j02, j12 = -fx * slope_x * rz, -fy * slope_y * rz
            cov_xx, cov_xy, cov_yy = EPS2D, 0.0, EPS2D
            for c in range(3):
                scale = float(scales[b, n, c])
                u = (j00 * rotation[0, c] + j02 * rotation[2, c]) * scale
                v = (j11 * rotation[1, c] + j12 * rotation[2, c]) * scale
                cov_xx += u * u
                cov_xy += u * v
                cov_yy += v * v
            det = cov_xx * cov_yy - cov_xy * cov_xy
            if not (det > 0.0):
                continue
            # Beyond this many standard deviations alpha < 1/255 (arXiv 2402.00525, B.2).
            extent = min(EXTENT_MAX, math.sqrt(2.0 * math.log(opacity / ALPHA_MIN)))
            radius_x = math.ceil(extent * math.sqrt(cov_xx))
            radius_y = math.ceil(extent * math.sqrt(cov_yy))
            u, v = fx * x * rz + cx, fy * y * rz + cy
            inside = u + radius_x > 0 and u - radius_x < width
            inside = inside and v + radius_y > 0 and v - radius_y < height
            if not (inside and radius_x > 0 and radius_y > 0):
                continue
            radii[b, n, 0] = min(radius_x, 2147483000.0)
            radii[b, n, 1] = min(radius_y, 2147483000.0)
            means2d[b, n, 0] = u
            means2d[b, n, 1] = v
            depths[b, n] = z
            conics[b, n, 0] = cov_yy / det
            conics[b, n, 1] = -cov_xy / det
            conics[b, n, 2] = cov_xx / det
            dx, dy, dz = px - centres[b, 0], py - centres[b, 1], pz - centres[b, 2]
            inverse = 1.0 / max(math.sqrt(dx * dx + dy * dy + dz * dz), 1e-12)
            _sh_basis(degree, dx * inverse, dy * inverse, dz * inverse, basis)
            red = green = blue = 0.5
            for m in range(num_bases):
                red += basis[m] * sh[sh_row, n, m, 0]
                green += basis[m] * sh[sh_row, n, m, 1]
                blue += basis[m] * sh[sh_row, n, m, 2]
            colors[b, n, 0] = max(red, 0.0)
            colors[b, n, 1] = max(green, 0.0)
            colors[b, n, 2] = max(blue, 0.0)


@njit(**_KERNEL)
def project_backward(
    start, stop, means, quats, scales, sh, degree, cameras, intrinsics, centres, width, height,
    conics, radii, v_means2d, v_conics, v_colors, v_depths, v_means, v_quats, v_scales, v_sh,
):  # fmt: skip
    """Fill v_means, v_quats, v_scales and v_sh (zero on entry) of the splats start..stop.

    The views are walked in order inside, so that harmonics shared by all add up deterministically.
    """
    basis = np.empty(16)
    v_basis = np.empty(16)
    rot = np.empty((3, 3))  # camera rotation times splat rotation
    v_rot = np.empty((3, 3))
    num_bases = (degree + 1) * (degree + 1)
    for b in range(means.shape[0]):
        fx, fy = float(intrinsics[b, 0, 0]), float(intrinsics[b, 1, 1])
        cx, cy = float(intrinsics[b, 0, 2]), float(intrinsics[b, 1, 2])
        camera = cameras[b]
        sh_row = min(b, sh.shape[0] - 1)
        for n in range(start, stop):
            if radii[b, n, 0] <= 0 or radii[b, n, 1] <= 0:
                continue
            px, py, pz = float(means[b, n, 0]), float(means[b, n, 1]), float(means[b, n, 2])
            x, y, z = _camera_position(camera, px, py, pz)
            qw, qx, qy, qz, q_inverse = _unit_quaternion(quats[b, n])
            _camera_rotation(camera, qw, qx, qy, qz, rot)
            rz = 1.0 / z
            slope_x, inside_x = _frustum_clamp(x * rz, fx, cx, width)
            slope_y, inside_y = _frustum_clamp(y * rz, fy, cy, height)
            j00, j11 = fx * rz, fy * rz
            j02, j12 = -fx * slope_x * rz, -fy * slope_y * rz

            # conic = covariance^-1, hence d(loss)/d(cov) = -conic . G . conic
            ca, cb, cc = float(conics[b, n, 0]), float(conics[b, n, 1]), float(conics[b, n, 2])
            ga, gb, gc = v_conics[b, n, 0], 0.5 * v_conics[b, n, 1], float(v_conics[b, n, 2])
            m00, m01 = ca * ga + cb * gb, ca * gb + cb * gc
            m10, m11 = cb * ga + cc * gb, cb * gb + cc * gc
            g_xx = -(m00 * ca + m01 * cb)
            g_xy = -(m00 * cb + m01 * cc)
            g_yy = -(m10 * cb + m11 * cc)

            # cov = M M^T with M = J rot diag(scale), J the 2x3 projection Jacobian
            v_j00 = v_j02 = v_j11 = v_j12 = 0.0
            for c in range(3):
                scale = float(scales[b, n, c])
                u = j00 * rot[0, c] + j02 * rot[2, c]
                v = j11 * rot[1, c] + j12 * rot[2, c]
                v_u = 2.0 * (g_xx * u + g_xy * v) * scale
                v_v = 2.0 * (g_xy * u + g_yy * v) * scale
                v_scales[b, n, c] = v_u * u + v_v * v
                v_u *= scale
                v_v *= scale
                v_rot[0, c] = j00 * v_u
                v_rot[1, c] = j11 * v_v
                v_rot[2, c] = j02 * v_u + j12 * v_v
                v_j00 += v_u * rot[0, c]
                v_j02 += v_u * rot[2, c]
                v_j11 += v_v * rot[1, c]
                v_j12 += v_v * rot[2, c]

            # quaternion: back through the camera rotation, then through the normalisation
            for c in range(3):
                r0, r1, r2 = v_rot[0, c], v_rot[1, c], v_rot[2, c]
                for r in range(3):
                    rot[r, c] = camera[0, r] * r0 + camera[1, r] * r1 + camera[2, r] * r2
            d_zy, d_xz, d_yx = rot[2, 1] - rot[1, 2], rot[0, 2] - rot[2, 0], rot[1, 0] - rot[0, 1]
            s_yx, s_zx, s_zy = rot[1, 0] + rot[0, 1], rot[2, 0] + rot[0, 2], rot[2, 1] + rot[1, 2]
            vw = 2.0 * (qx * d_zy + qy * d_xz + qz * d_yx)
            vx = 2.0 * (-2.0 * qx * (rot[1, 1] + rot[2, 2]) + qy * s_yx + qz * s_zx + qw * d_zy)
            vy = 2.0 * (qx * s_yx - 2.0 * qy * (rot[0, 0] + rot[2, 2]) + qz * s_zy + qw * d_xz)
            vz = 2.0 * (qx * s_zx + qy * s_zy - 2.0 * qz * (rot[0, 0] + rot[1, 1]) + qw * d_yx)
            dot = vw * qw + vx * qx + vy * qy + vz * qz
            v_quats[b, n, 0] = (vw - dot * qw) * q_inverse
            v_quats[b, n, 1] = (vx - dot * qx) * q_inverse
            v_quats[b, n, 2] = (vy - dot * qy) * q_inverse
            v_quats[b, n, 3] = (vz - dot * qz) * q_inverse

            # position in camera axes: pinhole projection, depth, Jacobian
            g_u, g_v = float(v_means2d[b, n, 0]), float(v_means2d[b, n, 1])
            gx, gy = j00 * g_u, j11 * g_v
            gz = -(j00 * x * g_u + j11 * y * g_v) * rz + v_depths[b, n]
            gz -= (j00 * v_j00 + j11 * v_j11) * rz
            # j02 = -fx slope_x / z, where slope_x is x/z inside the frustum and constant outside
            gz -= (j02 * v_j02 + j12 * v_j12) * rz
            if inside_x:
                gx -= j00 * rz * v_j02
                gz += j00 * rz * slope_x * v_j02
            if inside_y:
                gy -= j11 * rz * v_j12
                gz += j11 * rz * slope_y * v_j12
            wx = camera[0, 0] * gx + camera[1, 0] * gy + camera[2, 0] * gz
            wy = camera[0, 1] * gx + camera[1, 1] * gy + camera[2, 1] * gz
            wz = camera[0, 2] * gx + camera[1, 2] * gy + camera[2, 2] * gz

            # colour: harmonics of the viewing direction, cut off at zero
            dx, dy, dz = px - centres[b, 0], py - centres[b, 1], pz - centres[b, 2]
            inverse = 1.0 / max(math.sqrt(dx * dx + dy * dy + dz * dz), 1e-12)
            dx, dy, dz = dx * inverse, dy * inverse, dz * inverse
            _sh_basis(degree, dx, dy, dz, basis)
            red = green = blue = 0.5
            for m in range(num_bases):
                red += basis[m] * sh[sh_row, n, m, 0]
                green += basis[m] * sh[sh_row, n, m, 1]
                blue += basis[m] * sh[sh_row, n, m, 2]
            v_red = float(v_colors[b, n, 0]) if red >= 0.0 else 0.0
            v_green = float(v_colors[b, n, 1]) if green >= 0.0 else 0.0
            v_blue = float(v_colors[b, n, 2]) if blue >= 0.0 else 0.0
            for m in range(num_bases):
                v_basis[m] = (
                    v_red * sh[sh_row, n, m, 0]
                    + v_green * sh[sh_row, n, m, 1]
                    + v_blue * sh[sh_row, n, m, 2]
                )
                v_sh[sh_row, n, m, 0] += basis[m] * v_red
                v_sh[sh_row, n, m, 1] += basis[m] * v_green
                v_sh[sh_row, n, m, 2] += basis[m] * v_blue
            gx, gy, gz = _sh_direction_gradient(degree, dx, dy, dz, v_basis)
            dot = gx * dx + gy * dy + gz * dz
            v_means[b, n, 0] = wx + (gx - dot * dx) * inverse
            v_means[b, n, 1] = wy + (gy - dot * dy) * inverse
            v_means[b, n, 2] = wz + (gz - dot * dz) * inverse
